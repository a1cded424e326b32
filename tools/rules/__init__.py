"""Rules on source text that no other linter has: ``python -m tools.rules`` prints what breaks one.

A rule is a function of the `Repository` that yields a line for each finding, as `Source.problem`
makes it: where, what is wrong, and what to do instead. `tools.rules.__main__` lists the rules.
"""
