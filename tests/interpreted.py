"""Import this before anything else imports triton: its kernels are then interpreted, on the CPU."""

import importlib
import os
import pkgutil

import paddledsv4.kernels


def import_kernels() -> None:
    """Triton decides on import whether a kernel is interpreted. The variable is not left behind: to the numeric
    policy this is a machine without a GPU."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        for module in pkgutil.iter_modules(paddledsv4.kernels.__path__):
            importlib.import_module(f"paddledsv4.kernels.{module.name}")
        importlib.import_module("paddledsv4.kernels.interpreter").mend()
        importlib.import_module("triton.experimental.gluon")  # which a first launch imports, and which must agree
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


import_kernels()
