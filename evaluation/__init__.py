"""Features, classifiers, evaluation protocols and results."""
