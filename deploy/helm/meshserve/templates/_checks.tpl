{{/* Values that contradict each other, refused with the way out. */}}
{{- define "meshserve.checks" -}}
{{- $values := .Values -}}
{{- if and (eq $values.gateway.auth.mode "required") (not $values.gateway.auth.existingSecret) -}}
{{- fail "gateway.auth.existingSecret is empty: name a Secret with API keys (docs/kubernetes.md shows how to make one), or set gateway.auth.mode=off for a trial" -}}
{{- end -}}
{{- $models := include "meshserve.models" . | fromJson -}}
{{- if and $values.defaultModel (not (hasKey $models $values.defaultModel)) -}}
{{- fail (printf "defaultModel is %q, which is not among models" $values.defaultModel) -}}
{{- end -}}
{{- $slugs := dict -}}
{{- range $name := keys $models | sortAlpha -}}
{{- $slug := include "meshserve.slug" $name -}}
{{- if hasKey $slugs $slug -}}
{{- fail (printf "models %q and %q would both be called %q in Kubernetes: rename one" (get $slugs $slug) $name $slug) -}}
{{- end -}}
{{- $_ := set $slugs $slug $name -}}
{{- with (get $models $name).sharesEngineOf -}}
{{- if not (hasKey $models .) -}}
{{- fail (printf "models.%s.sharesEngineOf is %q, which is not among models" $name .) -}}
{{- end -}}
{{- if (get $models .).sharesEngineOf -}}
{{- fail (printf "models.%s.sharesEngineOf: %s has no engines itself; name the model whose engines it shares" $name .) -}}
{{- end -}}
{{- if (get $models $name).engine -}}
{{- fail (printf "models.%s: it has no engines of its own, so that `engine` says nothing; leave it out, or sharesEngineOf" $name) -}}
{{- end -}}
{{- end -}}
{{- $engine := include "meshserve.engine" (dict "root" $ "model" $name) | fromJson -}}
{{- $scaling := $engine.autoscaling -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail (printf "models.%s: autoscaling.minReplicas is above maxReplicas" $name) -}}
{{- end -}}
{{- if and (eq $scaling.kind "hpa") (eq (int $scaling.minReplicas) 0) -}}
{{- fail (printf "models.%s: an HPA leaves one engine at least; set autoscaling.kind to keda, or minReplicas to 1" $name) -}}
{{- end -}}
{{- if ne $scaling.kind "none" -}}
{{- if not (or $scaling.waitingSequences $scaling.kvCachePercent $scaling.timeToFirstTokenSeconds $scaling.cpuPercent) -}}
{{- fail (printf "models.%s: autoscaling has no metric to go by" $name) -}}
{{- end -}}
{{- end -}}
{{- if and (eq (int $engine.maxSurge) 0) (eq (int $engine.maxUnavailable) 0) -}}
{{- fail (printf "models.%s: with maxSurge and maxUnavailable both 0 no engine could ever be replaced" $name) -}}
{{- end -}}
{{- end -}}
{{- if and $values.tls.enabled $values.tls.certManager.enabled -}}
{{- if not $values.tls.certManager.issuerRef.name -}}
{{- fail "tls.certManager.issuerRef is empty: name the Issuer or ClusterIssuer that signs the certificates" -}}
{{- end -}}
{{- else if $values.tls.enabled -}}
{{- range $service := list "gateway" "tokenizer" "engine" "cache" "safety" -}}
{{- if not (get $values.tls.secrets $service) -}}
{{- fail (printf "tls.secrets.%s is empty: with tls.enabled every service needs a Secret with tls.crt, tls.key and ca.crt; or set tls.certManager.enabled" $service) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $routes := $values.gateway.gatewayApi -}}
{{- if and $routes.enabled $routes.httpHostnames -}}
{{- if not $routes.grpcHostnames -}}
{{- fail "gateway.gatewayApi: with httpHostnames set grpcHostnames too: a GRPCRoute and an HTTPRoute may not answer to the same names" -}}
{{- end -}}
{{- range $routes.httpHostnames -}}
{{- if has . $routes.grpcHostnames -}}
{{- fail (printf "gateway.gatewayApi: %s is among grpcHostnames and httpHostnames; a GRPCRoute and an HTTPRoute may not answer to the same names" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not (or $values.valkey.url $values.valkey.existingSecret $values.valkey.embedded.enabled) -}}
{{- fail "valkey: set url or existingSecret, or leave embedded.enabled true" -}}
{{- end -}}
{{- end -}}
