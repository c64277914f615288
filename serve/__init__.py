"""The online service on Ray Serve.

Read in this order: :mod:`serve.config` (settings), :mod:`serve.app` (deployments),
:mod:`serve.ingress` and :mod:`serve.routing` (routes), :mod:`serve.middleware` (what every request
passes), :mod:`serve.sign_in` and :mod:`serve.pages` (the browser's side), then the parts:
:mod:`serve.embedder`, :mod:`serve.search`, :mod:`serve.grounding`, :mod:`serve.chat_engine`.
:mod:`serve.proxy` and :mod:`serve.proxy_process` stand in front of all. :mod:`serve.local` runs all
of it on one machine; with :mod:`serve.fake_engine` it needs no vLLM.
"""
