{{/* Names, labels and addresses of the services. */}}

{{- define "meshserve.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $name = ternary .Release.Name (printf "%s-meshserve" .Release.Name) (contains "meshserve" .Release.Name) -}}
{{- end -}}
{{- $name | trunc 30 | trimSuffix "-" -}}
{{- end -}}

{{/* A model's name as part of the names of objects. */}}
{{- define "meshserve.slug" -}}
{{- regexReplaceAll "[^a-z0-9]+" (lower .) "-" | trimAll "-" | trunc 24 | trimSuffix "-" -}}
{{- end -}}

{{/* The name of a service's objects: (dict "root" $ "service" "engine" "model" NAME). */}}
{{- define "meshserve.name" -}}
{{- include "meshserve.fullname" .root -}}-{{- .service -}}
{{- with .model -}}-{{- include "meshserve.slug" . -}}{{- end -}}
{{- end -}}

{{/* The name that all replicas of a service have together; the gateway's own is that of the Service
that callers use. */}}
{{- define "meshserve.headlessName" -}}
{{- include "meshserve.name" . -}}{{- if eq .service "gateway" -}}-replicas{{- end -}}
{{- end -}}

{{/* By what the pods of a service are known; of all engines without a model. */}}
{{- define "meshserve.selector" -}}
app.kubernetes.io/name: meshserve
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .service }}
{{- with .model }}
meshserve/model: {{ include "meshserve.slug" . }}
{{- end }}
{{- end -}}

{{- define "meshserve.labels" -}}
{{ include "meshserve.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: meshserve
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* The Secret with the certificate of a service. */}}
{{- define "meshserve.tlsSecret" -}}
{{- default (printf "%s-%s-tls" (include "meshserve.fullname" .root) .service) (get .root.Values.tls.secrets .service) -}}
{{- end -}}

{{/* Ports of all services, as a YAML mapping. */}}
{{- define "meshserve.ports" -}}
gateway: {grpc: 50051, http: 8080, metrics: 9451}
tokenizer: {grpc: 50052, metrics: 9452}
engine: {grpc: 50053, metrics: 9453}
cache: {grpc: 50054, metrics: 9454}
safety: {grpc: 50055, metrics: 9455}
{{- end -}}

{{/* What is spoken on their gRPC ports. */}}
{{- define "meshserve.grpcProtocol" -}}
{{- ternary "https" "kubernetes.io/h2c" .Values.tls.enabled -}}
{{- end -}}

{{/* Full names of their gRPC services, which their health goes by. */}}
{{- define "meshserve.health" -}}
gateway: meshserve.v1.InferenceService
tokenizer: meshserve.v1.TokenizerService
engine: meshserve.v1.EngineService
cache: meshserve.v1.CacheService
safety: meshserve.v1.SafetyService
{{- end -}}

{{- define "meshserve.image" -}}
{{- .root.Values.image.registry -}}{{- .root.Values.image.prefix -}}{{- .image -}}:
{{- default .root.Chart.AppVersion .root.Values.image.tag -}}
{{- end -}}

{{/* The models, as JSON. */}}
{{- define "meshserve.models" -}}
{{- default (dict "smollm2-135m" (dict "source" "smollm2-135m")) .Values.models | toJson -}}
{{- end -}}

{{- define "meshserve.defaultModel" -}}
{{- default (keys (include "meshserve.models" . | fromJson) | sortAlpha | first) .Values.defaultModel -}}
{{- end -}}

{{/* The model whose engines host a model: its own, or those that it shares. */}}
{{- define "meshserve.hostOf" -}}
{{- default .model (get (get (include "meshserve.models" .root | fromJson) .model) "sharesEngineOf") -}}
{{- end -}}

{{/* The models that have engines, as JSON. */}}
{{- define "meshserve.hosts" -}}
{{- $root := . -}}
{{- $hosts := list -}}
{{- range $name := keys (include "meshserve.models" . | fromJson) | sortAlpha -}}
{{- if eq (include "meshserve.hostOf" (dict "root" $root "model" $name)) $name -}}
{{- $hosts = append $hosts $name -}}
{{- end -}}
{{- end -}}
{{- toJson $hosts -}}
{{- end -}}

{{/* The models that the engines of a model host, that one first, as JSON. */}}
{{- define "meshserve.hosted" -}}
{{- $own := . -}}
{{- $hosted := list .model -}}
{{- range $name := keys (include "meshserve.models" .root | fromJson) | sortAlpha -}}
{{- if and (ne $name $own.model) (eq (include "meshserve.hostOf" (dict "root" $own.root "model" $name)) $own.model) -}}
{{- $hosted = append $hosted $name -}}
{{- end -}}
{{- end -}}
{{- toJson $hosted -}}
{{- end -}}

{{/* What holds for the engines of one model, as JSON: engineDefaults under its own `engine`. */}}
{{- define "meshserve.engine" -}}
{{- $own := get (get (include "meshserve.models" .root | fromJson) .model) "engine" | default dict -}}
{{- mergeOverwrite (deepCopy .root.Values.engineDefaults) $own | toJson -}}
{{- end -}}

{{/* How long a service may take to finish what it has, in seconds. */}}
{{- define "meshserve.drainSeconds" -}}
{{- $own := dict -}}
{{- if .engine -}}{{- $own = .engine.settings -}}{{- end -}}
{{- $shared := get .root.Values.settings .service -}}
{{- ceil (dig "drain_timeout_s" (dig "drain_timeout_s" 30 $shared) $own) -}}
{{- end -}}

{{- define "meshserve.targetReference" -}}
{{- if and .engine .engine.multiNode.enabled -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
{{- else -}}
apiVersion: apps/v1
kind: Deployment
{{- end }}
name: {{ include "meshserve.name" . }}
{{- end -}}

{{- define "meshserve.embedsValkey" -}}
{{- $valkey := .Values.valkey -}}
{{- if and $valkey.embedded.enabled (not $valkey.url) (not $valkey.existingSecret) -}}yes{{- end -}}
{{- end -}}
