"""Record a training run as a bundle that ``align run``, ``compare`` and ``doctor`` read, from outside the trainer.

A captured bundle is a reference bundle of format 1 (align/bundle.py), and its ``trace`` folder is laid out as there::

    trace/                        step 1: its microbatch 0, and what belongs to the step
    trace/step000001-mb1/         any other microbatch of step 1
    trace/step000002/             what belongs to step 2
    trace/step000002-mb0/         microbatch 0 of step 2, and so on
    trace/rank00001/...           the same of every rank but the first, where ranks were merged

Per microbatch: ``forward``, ``activation_grads`` (in the order in which backward gave them) and ``choices``. Per
step: ``param_grads`` (summed over microbatches and ranks, before clipping), ``optimizer`` (after the step, as
``m/NAME``, ``v/NAME`` and ``master/NAME``) and ``after_stepN.json`` (MD5s of all parameters and kept buffers).

Each kind is a pair: ``KIND.safetensors`` holds the tensors in full, ``KIND.json`` has ``name: [shape, dtype, md5]``, of
gradients with their norm as a fourth entry. dtypes are spelt as torch does. ``choices`` differs: its json has
``name: {chosen, md5, margin}``. The tensor ``name`` is what was chosen (a router's map, an indexer's top-k) and
``name@margin``, float32, holds for each token the distance between the last chosen and the first rejected score,
infinite where nothing was rejected; the json has its minimum, and how many margins lie below each power of ten.
"""
