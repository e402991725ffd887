"""Commands of the command line, a file each: ``add_parser`` describes one, ``run`` is what it does."""
