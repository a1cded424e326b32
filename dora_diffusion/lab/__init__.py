"""The toy world and its judges, studies, analysis, plans of fleets. The core imports none of it."""
