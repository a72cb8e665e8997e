"""What a student learns from: a teacher's distributions for the trained tokens of a sample.

format.py    what is kept of them and how it lies on the disk (docs/teacher-cache.md says the same for another language)
writer.py    one unit of a cache, whole or absent
reader.py    any sample of a cache, by its content
"""
