{{/* meshserve.yaml: what the chart knows laid over `settings`. */}}
{{- define "meshserve.config" -}}
{{- $root := . -}}
{{- $host := .Values.listenHost -}}
{{- $default := include "meshserve.defaultModel" . -}}
{{- $ports := include "meshserve.ports" . | fromYaml -}}
{{- $models := include "meshserve.models" . | fromJson -}}
models:
{{- range $name := prepend (without (keys $models | sortAlpha) $default) $default }}
{{- $hostName := include "meshserve.hostOf" (dict "root" $root "model" $name) }}
{{- $engine := include "meshserve.engine" (dict "root" $root "model" $hostName) | fromJson }}
{{- $model := omit (get $models $name) "engine" "sharesEngineOf" }}
{{- $target := printf "dns:///%s:50053" (include "meshserve.name" (dict "root" $root "service" "engine" "model" $hostName)) }}
{{- $model = merge (dict "engine_target" $target) $model }}
{{- if and (eq $engine.autoscaling.kind "keda") (eq (int $engine.autoscaling.minReplicas) 0) }}
{{- $model = merge (dict "activation_timeout_s" $engine.autoscaling.activationSeconds) $model }}
{{- end }}
{{ dict $name $model | toYaml | indent 2 }}
{{- end }}
{{- $sections := dict }}
{{- range $service, $own := $ports }}
{{- $section := dict "listen" (printf "%s:%v" $host $own.grpc) "metrics_listen" (printf "%s:%v" $host $own.metrics) }}
{{- if eq $service "gateway" }}
{{- $_ := set $section "http_listen" (printf "%s:%v" $host $own.http) }}
{{- $auth := dict "mode" $root.Values.gateway.auth.mode }}
{{- if $root.Values.gateway.auth.existingSecret }}
{{- $_ := set $auth "keys_file" (printf "/etc/meshserve/keys/%s" $root.Values.gateway.auth.secretKey) }}
{{- end }}
{{- $_ := set $section "auth" $auth }}
{{- end }}
{{- $model := ternary (include "meshserve.hostOf" (dict "root" $root "model" $default)) "" (eq $service "engine") }}
{{- $name := include "meshserve.headlessName" (dict "root" $root "service" $service "model" $model) }}
{{- $_ := set $section "target" (printf "dns:///%s:%v" $name $own.grpc) }}
{{- if $root.Values.tls.enabled }}
{{- $folder := "/etc/meshserve/tls" }}
{{- $tls := dict "certificate" (printf "%s/tls.crt" $folder) "private_key" (printf "%s/tls.key" $folder) "ca" (printf "%s/ca.crt" $folder) }}
{{- if and $root.Values.tls.mutual (ne $service "gateway") }}
{{- $_ := set $tls "client_ca" (printf "%s/ca.crt" $folder) }}
{{- end }}
{{- $_ := set $section "tls" $tls }}
{{- end }}
{{- if and (eq $service "safety") $root.Values.safety.policies }}
{{- $policies := dict }}
{{- range $name, $_ := $root.Values.safety.policies }}
{{- $_ := set $policies $name (printf "/etc/meshserve/policies/%s.yaml" $name) }}
{{- end }}
{{- $_ := set $section "policies" $policies }}
{{- end }}
{{- $_ := set $sections $service (mergeOverwrite (deepCopy (get $root.Values.settings $service)) $section) }}
{{- end }}
{{ toYaml $sections }}
{{- $valkey := .Values.valkey }}
{{- $secret := printf "/etc/meshserve/valkey/%s" $valkey.secretKey }}
valkey:
  {{- if and $valkey.existingSecret (not $valkey.url) }}
  url_file: {{ $secret }}
  {{- else }}
  url: {{ default (printf "redis://%s:6379/0" (include "meshserve.name" (dict "root" . "service" "valkey"))) $valkey.url }}
  {{- if $valkey.existingSecret }}
  password_file: {{ $secret }}
  {{- end }}
  {{- end }}
{{- with .Values.settings.telemetry }}
telemetry:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What a service reads of meshserve.yaml; takes what `meshserve.podTemplate` takes. */}}
{{- define "meshserve.ownSettings" -}}
{{- $all := include "meshserve.config" .root | fromYaml -}}
{{- if eq .service "gateway" -}}
{{- $all | toYaml -}}
{{- else -}}
{{- $own := pick $all .service "telemetry" -}}
{{- if eq .service "cache" -}}
{{- $_ := set $own "valkey" $all.valkey -}}
{{- else if eq .service "tokenizer" -}}
{{- $_ := set $own "models" $all.models -}}
{{- else if eq .service "engine" -}}
{{- $hosted := dict -}}
{{- range $name := include "meshserve.hosted" . | fromJsonArray -}}
{{- $_ := set $hosted $name (get $all.models $name) -}}
{{- end -}}
{{- $_ := set $own "models" $hosted -}}
{{- /* A variable says its own. */ -}}
{{- $_ := set $own "engine" (omit $all.engine "target") -}}
{{- end -}}
{{- $own | toYaml -}}
{{- end -}}
{{- end -}}
