"""The training step: data order, losses and their scales, optimizer, schedule, the loop."""
