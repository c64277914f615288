{{- /* Ray cluster, which a job, a service or nothing else is run on: RayClusterSpec. */ -}}
{{- define "pathflip.cluster" -}}
rayVersion: {{ .Values.rayVersion | quote }}
# The operator makes a Secret with a random token, and every Ray container asks for it. Tokens are not
# encrypted on the way: hence the network policy.
authOptions: {mode: token}
enableInTreeAutoscaling: true
autoscalerOptions:
  version: v2
  upscalingMode: Default
  idleTimeoutSeconds: {{ .Values.idleSeconds }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  resources:
    requests: {cpu: 250m, memory: 512Mi}
    limits: {cpu: 500m, memory: 1Gi}
  securityContext:
    {{- include "pathflip.containerSecurity" . | nindent 4 }}
{{- if eq .Values.gcs.backend "redis" }}
gcsFaultToleranceOptions:
  redisAddress: {{ .Values.gcs.redis.address | quote }}
  redisPassword:
    valueFrom:
      secretKeyRef:
        name: {{ required "gcs.redis.secret: name the Secret with the password of Redis" .Values.gcs.redis.secret | quote }}
        key: {{ .Values.gcs.redis.key | quote }}
{{- else if eq .Values.gcs.backend "rocksdb" }}
gcsFaultToleranceOptions:
  backend: rocksdb
  storage:
    size: {{ .Values.gcs.rocksdb.size | quote }}
    {{- if .Values.gcs.rocksdb.storageClass }}
    storageClassName: {{ .Values.gcs.rocksdb.storageClass | quote }}
    {{- end }}
{{- end }}
headGroupSpec:
  rayStartParams:
    num-cpus: "0"
    object-store-memory: {{ .Values.objectStoreBytes | quote }}
    object-spilling-directory: /spill
  template:
    {{- include "pathflip.pod" (dict "root" . "node" .Values.head "container" "ray-head" "image" .Values.image.cpu) | nindent 4 }}
workerGroupSpecs:
  {{- range $name, $group := .Values.groups }}
  {{- if $group }}
  - groupName: {{ $name | quote }}
    replicas: {{ $group.min }}
    minReplicas: {{ $group.min }}
    maxReplicas: {{ $group.max }}
    rayStartParams:
      object-store-memory: {{ $.Values.objectStoreBytes | quote }}
      object-spilling-directory: /spill
    template:
      {{- if $group.gpus }}
      {{- include "pathflip.pod" (dict "root" $ "node" $group "container" "ray-worker" "image" $.Values.image.gpu) | nindent 6 }}
      {{- else }}
      {{- include "pathflip.pod" (dict "root" $ "node" $group "container" "ray-worker" "image" $.Values.image.cpu) | nindent 6 }}
      {{- end }}
  {{- end }}
  {{- end }}
{{- end }}
