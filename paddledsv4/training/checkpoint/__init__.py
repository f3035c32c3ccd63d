"""Training checkpoints: safetensors and JSON, written by many ranks, complete or absent.

``directory``  the folder of a run: what is complete, what is the latest, which ones are deleted
``shard``      the file of one rank: pieces of tensors, each with its place in the whole
``state``      what of a trainer is saved, and which rank saves it
``save``       when to save, and the thread that writes
``resume``     whether a checkpoint belongs to this run, and back into a trainer
"""
