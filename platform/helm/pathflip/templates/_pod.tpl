{{- define "pathflip.labels" -}}
app.kubernetes.io/name: pathflip
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "pathflip.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{- define "pathflip.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.user }}
runAsGroup: {{ .Values.user }}
fsGroup: {{ .Values.user }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* Pod of a Ray node. Takes root, node (its values), container (its name) and image. */ -}}
{{- define "pathflip.pod" -}}
{{- $values := .root.Values -}}
{{- $drain := index $values.drainSeconds $values.run -}}
{{- $tokens := eq $values.run "service" -}}
metadata:
  labels:
    {{- include "pathflip.labels" .root | nindent 4 }}
spec:
  {{- if $values.serviceAccount }}
  serviceAccountName: {{ $values.serviceAccount | quote }}
  {{- else if ne .container "ray-head" }}
  automountServiceAccountToken: false
  {{- end }}
  securityContext:
    {{- include "pathflip.podSecurity" .root | nindent 4 }}
  # More than the drain below, or pods die in the middle of a slide or an answer.
  terminationGracePeriodSeconds: {{ add $drain 60 }}
  {{- if .node.nodeSelector }}
  nodeSelector:
    {{- toYaml .node.nodeSelector | nindent 4 }}
  {{- end }}
  {{- if .node.tolerations }}
  tolerations:
    {{- toYaml .node.tolerations | nindent 4 }}
  {{- end }}
  {{- if $values.image.pullSecrets }}
  imagePullSecrets:
    {{- range $values.image.pullSecrets }}
    - name: {{ . | quote }}
    {{- end }}
  {{- end }}
  {{- if $tokens }}
  # Files of a Secret are the group's to read, which the service refuses: it gets a copy of its own.
  initContainers:
    - name: tokens
      image: {{ .image | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      command: [install, -m, "600", /run/secret/tokens, /run/pathflip/tokens]
      resources:
        requests: {cpu: 100m, memory: 64Mi}
        limits: {cpu: 100m, memory: 64Mi}
      securityContext:
        {{- include "pathflip.containerSecurity" .root | nindent 8 }}
      volumeMounts:
        - {name: secret, mountPath: /run/secret, readOnly: true}
        - {name: tokens, mountPath: /run/pathflip}
  {{- end }}
  containers:
    - name: {{ .container }}
      image: {{ .image | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      env:
        - {name: RAY_AUTH_MODE, value: token}
        - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ $drain | quote }}}
        # No more objects are spilled where the disk of the node is this full.
        - {name: RAY_local_fs_capacity_threshold, value: "0.9"}
        {{- range $name, $value := $values.environment }}
        - {name: {{ $name | quote }}, value: {{ $value | quote }}}
        {{- end }}
      {{- if $values.secrets }}
      envFrom:
        {{- range $values.secrets }}
        - secretRef: {name: {{ . | quote }}}
        {{- end }}
      {{- end }}
      {{- if eq .container "ray-head" }}
      ports:
        - {containerPort: 6379, name: gcs-server}
        - {containerPort: 8265, name: dashboard}
        {{- if $tokens }}
        # KubeRay makes the service of what has this name, of whichever pods are ready.
        - {containerPort: 8000, name: serve}
        {{- end }}
      {{- end }}
      resources:
        {{- range list "requests" "limits" }}
        {{ . }}:
          cpu: {{ $.node.cpu | quote }}
          memory: {{ $.node.memory | quote }}
          {{- if $.node.gpus }}
          {{ $values.gpuResource }}: {{ $.node.gpus }}
          {{- end }}
        {{- end }}
      securityContext:
        {{- include "pathflip.containerSecurity" .root | nindent 8 }}
      volumeMounts:
        - {name: ray, mountPath: /tmp/ray}
        - {name: spill, mountPath: /spill}
        {{- if $tokens }}
        - {name: tokens, mountPath: /run/pathflip, readOnly: true}
        {{- end }}
        {{- range $values.volumes }}
        - {name: {{ .name | quote }}, mountPath: {{ .path | quote }}, readOnly: {{ .readOnly }}}
        {{- end }}
  volumes:
    - name: ray
      emptyDir: {sizeLimit: {{ $values.temp | quote }}}
    - name: spill
      emptyDir: {sizeLimit: {{ $values.spill | quote }}}
    {{- if $tokens }}
    - name: secret
      secret: {secretName: {{ $values.service.tokensSecret | quote }}, items: [{key: tokens, path: tokens}]}
    - name: tokens
      emptyDir: {medium: Memory, sizeLimit: 1Mi}
    {{- end }}
    {{- range $values.volumes }}
    - name: {{ .name | quote }}
      persistentVolumeClaim: {claimName: {{ .claim | quote }}, readOnly: {{ .readOnly }}}
    {{- end }}
{{- end }}
