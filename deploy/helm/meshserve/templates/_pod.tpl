{{/* The pod of a service: (dict "root" $ "service" S "values" V "model" M "engine" E "args" A).
`model` and `engine` are for engines alone; `args` take the place of the image's own. */}}

{{- define "meshserve.podTemplate" -}}
{{- $root := .root -}}
{{- $values := .values -}}
{{- $service := .service -}}
{{- $holdsModels := has $service (list "engine" "tokenizer") -}}
metadata:
  labels:
    {{- include "meshserve.labels" . | nindent 4 }}
    {{- with $root.Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # Settings are read at the start: new ones are new pods of who reads them. What Secrets and
    # policies say changes in running pods.
    checksum/settings: {{ include "meshserve.ownSettings" . | sha256sum }}
    {{- with $root.Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "meshserve.fullname" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "meshserve.graceSeconds" . }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- if .engine }}
  {{- with .engine.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- end }}
  {{- with $values.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- $tolerations := $values.tolerations }}
  {{- if and .engine (eq .engine.device "cuda") }}
  {{- $tolerations = append $tolerations (dict "key" "nvidia.com/gpu" "operator" "Exists" "effect" "NoSchedule") }}
  {{- end }}
  {{- with $tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $root.Values.spreadOver }}
  topologySpreadConstraints:
    {{- range . }}
    - topologyKey: {{ . }}
      maxSkew: 1
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "meshserve.selector" $ | nindent 10 }}
    {{- end }}
  {{- end }}
  securityContext: {{- include "meshserve.podSecurity" . | nindent 4 }}
  {{- if and $holdsModels $root.Values.pull.enabled }}
  initContainers:
    {{- include "meshserve.pulls" . | nindent 4 }}
  {{- end }}
  containers:
    {{- include "meshserve.container" . | nindent 4 }}
  volumes:
    - name: settings
      configMap: {name: {{ include "meshserve.fullname" $root }}}
    - name: tmp
      emptyDir: {sizeLimit: 1Gi}
    {{- if $holdsModels }}
    - name: models
      {{- if eq $root.Values.storage.type "pvc" }}
      persistentVolumeClaim:
        claimName: {{ default (printf "%s-models" (include "meshserve.fullname" $root)) $root.Values.storage.existingClaim }}
      {{- else }}
      emptyDir: {sizeLimit: {{ $root.Values.storage.sizeLimit }}}
      {{- end }}
    {{- end }}
    {{- if eq $service "gateway" }}
    {{- with $root.Values.gateway.auth.existingSecret }}
    - name: keys
      secret: {secretName: {{ . }}, defaultMode: 0440}
    {{- end }}
    {{- end }}
    {{- if has $service (list "gateway" "cache") }}
    {{- with $root.Values.valkey.existingSecret }}
    - name: valkey
      secret: {secretName: {{ . }}, defaultMode: 0440}
    {{- end }}
    {{- end }}
    {{- if $root.Values.tls.enabled }}
    - name: tls
      secret: {secretName: {{ include "meshserve.tlsSecret" (dict "root" $root "service" $service) }}, defaultMode: 0440}
    {{- end }}
    {{- if and (eq $service "safety") $root.Values.safety.policies }}
    - name: policies
      configMap: {name: {{ include "meshserve.fullname" $root }}-policies}
    {{- end }}
{{- end -}}

{{/* Longer than the wait before the stop and the drain together, as the process ends by itself. */}}
{{- define "meshserve.graceSeconds" -}}
{{- $wait := dig "preStopSeconds" 2 .values -}}
{{- add $wait (include "meshserve.drainSeconds" . | int) 10 -}}
{{- end -}}

{{- define "meshserve.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "meshserve.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* One init container for each source that the pod needs; what is there is not pulled again. */}}
{{- define "meshserve.pulls" -}}
{{- $root := .root -}}
{{- $sources := list -}}
{{- $models := include "meshserve.models" $root | fromJson -}}
{{- if .engine -}}
{{- range $name := include "meshserve.hosted" . | fromJsonArray -}}
{{- $sources = append $sources (get $models $name).source -}}
{{- end -}}
{{- $shared := $root.Values.settings.engine -}}
{{- $draft := dig "speculation" "draft_model" (dig "speculation" "draft_model" "" $shared) .engine.settings -}}
{{- if $draft -}}{{- $sources = append $sources $draft -}}{{- end -}}
{{- else -}}
{{- range $name := keys $models | sortAlpha -}}
{{- $sources = append $sources (get $models $name).source -}}
{{- end -}}
{{- end -}}
{{- range $number, $source := uniq $sources }}
- name: pull-{{ $number }}
  image: {{ include "meshserve.image" (dict "root" $root "image" "cli") }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  args: [models, pull, {{ $source | quote }}]
  env:
    - {name: MESHSERVE_CACHE, value: /models}
    {{- range $name, $value := $root.Values.pull.env }}
    - {name: {{ $name }}, value: {{ $value | quote }}}
    {{- end }}
  {{- with $root.Values.pull.existingSecret }}
  envFrom:
    - secretRef: {name: {{ . }}}
  {{- end }}
  resources: {{- toYaml $root.Values.pull.resources | nindent 4 }}
  securityContext: {{- include "meshserve.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: models, mountPath: /models}
    - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end -}}
