"""Fast twins of what nn/ defines, compiled for this processor when asked for."""
