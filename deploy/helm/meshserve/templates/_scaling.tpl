{{/* How many engines of a model there are. */}}

{{- define "meshserve.engineHpa" -}}
{{- $scaling := .engine.autoscaling -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ include "meshserve.name" . }}
  labels: {{- include "meshserve.labels" . | nindent 4 }}
spec:
  scaleTargetRef: {{- include "meshserve.targetReference" . | nindent 4 }}
  minReplicas: {{ $scaling.minReplicas }}
  maxReplicas: {{ $scaling.maxReplicas }}
  behavior: {{- include "meshserve.scalingBehavior" $scaling | nindent 4 }}
  # Of several metrics the one that wants most engines decides.
  metrics:
    {{- if $scaling.waitingSequences }}
    - type: Pods
      pods:
        metric: {name: meshserve_engine_waiting_sequences}
        target: {type: AverageValue, averageValue: {{ $scaling.waitingSequences | quote }}}
    {{- end }}
    {{- if $scaling.kvCachePercent }}
    - type: Pods
      pods:
        metric: {name: meshserve_engine_kv_cache_percent}
        target: {type: AverageValue, averageValue: {{ $scaling.kvCachePercent | quote }}}
    {{- end }}
    {{- if $scaling.timeToFirstTokenSeconds }}
    - type: External
      external:
        metric:
          name: meshserve_time_to_first_token_seconds_p95
          selector:
            matchLabels: {model: {{ .model | quote }}}
        target: {type: Value, value: {{ $scaling.timeToFirstTokenSeconds | quote }}}
    {{- end }}
    {{- if $scaling.cpuPercent }}
    - type: Resource
      resource:
        name: cpu
        target: {type: Utilization, averageUtilization: {{ $scaling.cpuPercent }}}
    {{- end }}
{{- end -}}

{{- define "meshserve.scalingBehavior" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies: [{type: Percent, value: 100, periodSeconds: 60}, {type: Pods, value: 2, periodSeconds: 60}]
scaleDown:
  stabilizationWindowSeconds: {{ .scaleDownSeconds }}
  # One at a time: what it held of others' prefixes is computed anew elsewhere.
  policies: [{type: Pods, value: 1, periodSeconds: 60}]
{{- end -}}

{{- define "meshserve.engineScaledObject" -}}
{{- $scaling := .engine.autoscaling -}}
{{- $url := .root.Values.monitoring.prometheusUrl -}}
{{- $of := printf "{namespace=%q,model=%q}" .root.Release.Namespace .model -}}
{{- $hosted := include "meshserve.hosted" . | fromJsonArray -}}
{{- if gt (len $hosted) 1 -}}
{{- $names := list -}}
{{- range $hosted -}}{{- $names = append $names (regexQuoteMeta .) -}}{{- end -}}
{{- $of = printf "{namespace=%q,model=~%q}" .root.Release.Namespace (join "|" $names) -}}
{{- end -}}
{{- $runs := printf "sum(meshserve_engine_running_sequences%s)" $of -}}
{{- $waits := printf "sum(meshserve_engine_waiting_sequences%s)" $of -}}
{{- $awaits := printf "sum(meshserve_gateway_requests_awaiting_engine%s)" $of -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ include "meshserve.name" . }}
  labels: {{- include "meshserve.labels" . | nindent 4 }}
spec:
  scaleTargetRef: {{- include "meshserve.targetReference" . | nindent 4 }}
  minReplicaCount: {{ $scaling.minReplicas }}
  maxReplicaCount: {{ $scaling.maxReplicas }}
  pollingInterval: 5
  cooldownPeriod: {{ $scaling.idleSeconds }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior: {{- include "meshserve.scalingBehavior" $scaling | nindent 8 }}
  triggers:
    {{- if eq (int $scaling.minReplicas) 0 }}
    # Awake while somebody waits for an engine, or one has something to do.
    - type: prometheus
      name: in-use
      metadata:
        serverAddress: {{ $url }}
        query: {{ printf "(%s or vector(0)) + (%s or vector(0)) + (%s or vector(0))" $awaits $runs $waits | quote }}
        threshold: {{ dig "max_running_sequences" (dig "max_running_sequences" 64 .root.Values.settings.engine) .engine.settings | quote }}
        activationThreshold: "0"
    {{- end }}
    {{- if $scaling.waitingSequences }}
    - type: prometheus
      name: waiting-sequences
      metadata:
        serverAddress: {{ $url }}
        query: {{ printf "%s or vector(0)" $waits | quote }}
        threshold: {{ $scaling.waitingSequences | quote }}
    {{- end }}
    {{- if $scaling.kvCachePercent }}
    - type: prometheus
      name: kv-cache
      metricType: Value
      metadata:
        serverAddress: {{ $url }}
        query: {{ printf "100 * sum(meshserve_engine_kv_blocks_used%s) / sum(meshserve_engine_kv_blocks%s) or vector(0)" $of $of | quote }}
        threshold: {{ $scaling.kvCachePercent | quote }}
        # How full the cache is keeps no engine awake.
        activationThreshold: "100"
    {{- end }}
    {{- if $scaling.timeToFirstTokenSeconds }}
    - type: prometheus
      name: time-to-first-token
      metricType: Value
      metadata:
        serverAddress: {{ $url }}
        query: {{ printf "histogram_quantile(0.95, sum by (le) (rate(meshserve_gateway_time_to_first_token_seconds_bucket%s[2m]))) > 0 or vector(0)" $of | quote }}
        threshold: {{ $scaling.timeToFirstTokenSeconds | quote }}
        activationThreshold: "1000000"
    {{- end }}
    {{- if $scaling.cpuPercent }}
    - type: cpu
      metricType: Utilization
      metadata: {value: {{ $scaling.cpuPercent | quote }}}
    {{- end }}
{{- end -}}

{{/* The pods beside the leader: they answer nobody, and compute what the leader tells them. */}}
{{- define "meshserve.workerTemplate" -}}
{{- $pod := include "meshserve.podTemplate" (merge (dict "args" .engine.multiNode.workerArgs) .) | fromYaml -}}
{{- $container := omit (first $pod.spec.containers) "startupProbe" "readinessProbe" "livenessProbe" "ports" "lifecycle" -}}
{{- if not .engine.multiNode.workerArgs -}}
{{- $_ := set $container "command" (list "python" "-m" "services.engine.core.parallel.machine") -}}
{{- end -}}
{{- $_ := set $pod.spec "containers" (list $container) -}}
{{- toYaml $pod -}}
{{- end -}}
