"""Training checkpoints: safetensors and JSON, written by many ranks, complete or absent.

``directory``  the folder of a run: what is complete, what is the latest, which ones are deleted
``shard``      the file of one rank: pieces of tensors, each with its place in the whole
``record``     what is said about the whole, written when all ranks are done
``state``      what of a trainer is saved, and which rank saves it
``identity``   which run a checkpoint belongs to, and what another layout changes
``save``       when to save, and the thread that writes
``resume``     from a checkpoint back into a trainer
``run``        a run that may begin with a checkpoint and may leave some
"""
