"""The penalties ``arclength`` and ``chordlength`` for rnode-plugin, which finds them by their entry points."""
