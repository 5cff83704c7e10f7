"""One reverse sweep: cotangents pulled back line by line, and what is extracted of each parameter."""
