"""Development and build helpers; not installed with the package."""
