"""Many workers on one search: a board on which work is posted and claimed, those who work, and who posts."""
