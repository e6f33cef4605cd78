"""Everything that is not the step."""
