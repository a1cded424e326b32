"""The app, its jobs, and their worker process. The rest of the package does not import it."""
