"""Operations that stand for several ops at once, and the table's `fused` variants: kernels on Paddle's tensors."""
