"""Online inference: checkpoints and bundles behind HTTP and gRPC, in one process, with the batching done here.

A request comes in at the door (`door.py`), which admits it or says 503. `rest.py`, `predict.py` and `grpc_server.py`
read what it asks for, and share the rest: lease a model from the `repository`, decode images in threads (`decoding`),
gather them into batches (`batching`), and turn logits into what was asked for (`request`). `server.py` listens, reloads
and stops. Nothing here is imported before `visformer serve` runs.
"""
