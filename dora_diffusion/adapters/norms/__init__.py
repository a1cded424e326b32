"""All that follows from parameters alone, once per optimizer step and for many layers together.

* `norms`: the norm through the rank, without a dense temporary, for layers of one shape together;
* `layout`: where the parameters of many layers lie, so that an operation serves all of them, and
  flags of theirs that are read back from the device without a wait;
* `plan`: norms, gains, and what the layers compute with;
* `factors`: one adapter's part in that.
"""
