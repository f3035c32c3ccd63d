"""Triton kernels of the hot operations and what drives them: grids, buffers, order of launches.

Nothing here knows a framework. A kernel takes pointers, strides and sizes; its driver takes tensors of any framework
and a :class:`~paddledsv4.kernels.carrier.Carrier` that allocates and launches for it. One file per operation:

    <op>.py    the kernels, then ``forward(carrier, ...)`` and ``backward(carrier, ...)``

``paddledsv4/fusions`` registers them as the ``fused`` variants, on Paddle tensors; tests and benchmarks/kernels.py
drive the same files with torch tensors. Importing a file needs triton (``pip install "paddledsv4[triton]"``).
"""
