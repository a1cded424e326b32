"""One step of the runs that train on one model: loss, gradients, optimizer."""
