"""The methods, each in a small file of its own; ``tests.bench.field.method`` has their names."""
