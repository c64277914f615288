"""Browser tests; a package, so that its browser ends when its last test has run."""
