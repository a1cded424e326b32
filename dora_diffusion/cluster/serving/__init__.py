"""Images of many adapters over HTTP.

* `batcher`: the queue, and the choice of requests for a batch;
* `catalogue`: the available adapters by name;
* `engine`: requests, and one base model in memory that samples a batch;
* `api`: the HTTP API;
* `server`: the HTTP server, with its limits and its shutdown;
* `deploy`: the replicas on Ray Serve. No other module needs Ray.
"""
