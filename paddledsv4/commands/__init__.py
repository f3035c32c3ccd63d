"""Commands of the ``paddledsv4`` command line that have a file of their own."""
