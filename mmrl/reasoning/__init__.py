"""Written solutions: records, step rewards and judges that read them, annotation, answers, benchmarks.

Stands on the core, which knows steps and trees alone; nothing in the core imports it.
"""
