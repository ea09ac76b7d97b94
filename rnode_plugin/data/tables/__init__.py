"""Tables: files of numbers with named columns, their splits, and the published benchmark sets."""
