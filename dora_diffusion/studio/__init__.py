"""The app, the jobs that it queues, and their worker. The core imports none of it."""
