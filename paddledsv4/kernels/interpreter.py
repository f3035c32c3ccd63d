"""Triton's interpreter under numpy 2.4: kernels run on a CPU, for tests."""

from __future__ import annotations

import functools

from triton.runtime import interpreter


@functools.cache
def mend() -> None:
    """Lets an interpreted kernel loop to a number that it was given: Triton 3.6 holds it as an array of one element,
    of which numpy 2.4 makes no integer."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
