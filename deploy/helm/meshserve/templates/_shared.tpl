{{/* Objects that every service has. */}}

{{/* All replicas by one name, for callers that balance themselves, and for what scrapes them. */}}
{{- define "meshserve.headless" -}}
{{- $ports := get (include "meshserve.ports" . | fromYaml) .service -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "meshserve.headlessName" . }}
  labels: {{- include "meshserve.labels" . | nindent 4 }}
spec:
  clusterIP: None
  selector:
    {{- include "meshserve.selector" . | nindent 4 }}
    {{- if .engine }}{{ if .engine.multiNode.enabled }}
    # The leader of each engine answers.
    leaderworkerset.sigs.k8s.io/worker-index: "0"
    {{- end }}{{ end }}
  ports:
    {{- range $name, $number := $ports }}
    - {name: {{ $name }}, port: {{ $number }}, targetPort: {{ $name }}{{ if eq $name "grpc" }}, appProtocol: {{ include "meshserve.grpcProtocol" $.root }}{{ end }}}
    {{- end }}
{{- end -}}

{{- define "meshserve.disruptionBudget" -}}
{{- if .root.Values.podDisruptionBudget.enabled -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "meshserve.name" . }}
  labels: {{- include "meshserve.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .root.Values.podDisruptionBudget.maxUnavailable }}
  # A replica that does not serve keeps no node from being drained.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels: {{- include "meshserve.selector" . | nindent 6 }}
{{- end -}}
{{- end -}}
