"""Images of many adapters over HTTP.

* `batcher`: the queue, and which requests are sampled together;
* `catalogue`: the adapters that may be asked for, by name;
* `engine`: requests, and one base model in memory that answers a batch;
* `api`: the HTTP API over these;
* `server`: the port, its limits, and how it ends;
* `deploy`: the replicas on Ray Serve. Nothing else needs Ray.
"""
