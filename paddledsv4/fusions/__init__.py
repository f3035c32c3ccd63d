"""Operations that stand for several ops at once, to save memory or time."""
