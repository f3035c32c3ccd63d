"""Find the first operation at fault: every op of a step on the reference's own inputs, in execution order."""
