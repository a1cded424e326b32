"""Planning of fleets: simulation of queues with failing workers, and closed-form solutions."""
