{{/* The container of a service; takes what `meshserve.podTemplate` takes. */}}
{{- define "meshserve.container" -}}
{{- $root := .root -}}
{{- $service := .service -}}
{{- $ports := get (include "meshserve.ports" . | fromYaml) $service -}}
{{- $image := $service -}}
{{- if .engine -}}{{- $image = printf "engine-%s" .engine.device -}}{{- end -}}
- name: {{ $service }}
  image: {{ include "meshserve.image" (dict "root" $root "image" $image) }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  {{- with .args }}
  args: {{- toYaml . | nindent 4 }}
  {{- end }}
  env: {{- include "meshserve.environment" . | nindent 4 }}
  ports:
    {{- range $name, $number := $ports }}
    - {name: {{ $name }}, containerPort: {{ $number }}}
    {{- end }}
  {{- $resources := deepCopy .values.resources }}
  {{- if .engine }}
  {{- if eq .engine.device "cuda" }}
  {{- $limits := merge (dict "nvidia.com/gpu" .engine.gpus) (get $resources "limits" | default dict) }}
  {{- $_ := set $resources "limits" $limits }}
  {{- end }}
  {{- end }}
  resources: {{- toYaml $resources | nindent 4 }}
  securityContext: {{- include "meshserve.containerSecurity" . | nindent 4 }}
  lifecycle:
    preStop:
      sleep: {seconds: {{ dig "preStopSeconds" 2 .values }}}
  {{- include "meshserve.probes" . | nindent 2 }}
  volumeMounts:
    # Settings are read at the start. What is read again is mounted as a folder: the kubelet changes
    # no file that is mounted by itself.
    - {name: settings, mountPath: /etc/meshserve/meshserve.yaml, subPath: meshserve.yaml, readOnly: true}
    - {name: tmp, mountPath: /tmp}
    {{- if has $service (list "engine" "tokenizer") }}
    - {name: models, mountPath: /models, readOnly: true}
    {{- end }}
    {{- if and (eq $service "gateway") $root.Values.gateway.auth.existingSecret }}
    - {name: keys, mountPath: /etc/meshserve/keys, readOnly: true}
    {{- end }}
    {{- if and (has $service (list "gateway" "cache")) $root.Values.valkey.existingSecret }}
    - {name: valkey, mountPath: /etc/meshserve/valkey, readOnly: true}
    {{- end }}
    {{- if $root.Values.tls.enabled }}
    - {name: tls, mountPath: /etc/meshserve/tls, readOnly: true}
    {{- end }}
    {{- if and (eq $service "safety") $root.Values.safety.policies }}
    - {name: policies, mountPath: /etc/meshserve/policies, readOnly: true}
    {{- end }}
{{- end -}}

{{- define "meshserve.environment" -}}
{{- $root := .root -}}
- {name: MESHSERVE_CONFIG, value: /etc/meshserve/meshserve.yaml}
{{- if has .service (list "engine" "tokenizer") }}
- {name: MESHSERVE_CACHE, value: /models}
{{- end }}
{{- if .engine }}
- {name: MESHSERVE_ENGINE__TARGET, value: {{ printf "dns:///%s:50053" (include "meshserve.name" .) }}}
- {name: MESHSERVE_ENGINE__DEVICE, value: {{ ternary "cuda:0" "cpu" (eq .engine.device "cuda") }}}
{{- if .engine.multiNode.enabled }}
# The ranks of an engine find its leader by this and by what the LeaderWorkerSet sets.
- {name: MASTER_PORT, value: "29500"}
- {name: LOCAL_WORLD_SIZE, value: {{ ternary .engine.gpus 1 (eq .engine.device "cuda") | quote }}}
{{- end }}
{{- range $key, $value := .engine.settings }}
- {name: MESHSERVE_ENGINE__{{ upper $key }}, value: {{ $value | toJson | quote }}}
{{- end }}
{{- end }}
{{- end -}}

{{/* Ready is who takes work; alive is who answers. An engine answers once its model is loaded and
warm. The kubelet's own probe speaks no TLS, ours does. */}}
{{- define "meshserve.probes" -}}
{{- $service := .service -}}
{{- $port := (get (include "meshserve.ports" . | fromYaml) $service).grpc -}}
{{- $health := get (include "meshserve.health" . | fromYaml) $service -}}
{{- $startSeconds := 120 -}}
{{- if .engine -}}{{- $startSeconds = int .engine.startupSeconds -}}{{- end -}}
{{- $alive := dict "grpc" (dict "port" $port "service" "liveness") -}}
{{- $ready := dict "grpc" (dict "port" $port "service" $health) -}}
{{- if .root.Values.tls.enabled -}}
{{- $alive = dict "exec" (dict "command" (list "meshserve" "probe" "--liveness" $service)) -}}
{{- $ready = dict "exec" (dict "command" (list "meshserve" "probe" $service)) -}}
{{- end -}}
startupProbe:
  {{- toYaml $alive | nindent 2 }}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: {{ divf $startSeconds 2 | ceil }}
readinessProbe:
  {{- toYaml $ready | nindent 2 }}
  periodSeconds: 3
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  {{- toYaml $alive | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}
