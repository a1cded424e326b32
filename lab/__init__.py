"""Studies, analysis of weights, plans of fleets, pretraining: from a clone, in no wheel."""
