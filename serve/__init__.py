"""The online service on Ray Serve.

Read in this order: :mod:`serve.app` (what is deployed), :mod:`serve.ingress` (the routes),
:mod:`serve.middleware` (what every request passes), then the parts: :mod:`serve.embedder`,
:mod:`serve.search`, :mod:`serve.grounding`, :mod:`serve.chat_engine`.
"""
