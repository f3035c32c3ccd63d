"""What a run tells about itself beyond its losses, every so many steps.

Nothing here takes part in the computation: gauges look at the ops of a step through
:func:`paddledsv4.observe.ops.watch_ops`, at those steps only.
"""
