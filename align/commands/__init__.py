"""Commands of align, one file each; align.cli registers them."""
