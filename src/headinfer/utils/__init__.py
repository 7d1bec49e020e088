"""Files, units, user folders, and the type of a K-V pair."""
