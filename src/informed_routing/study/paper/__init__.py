"""What serves the paper only: its printed numbers and claims, its models' shapes, and the theory behind the what-if.

It imports the study and the what-if, and neither imports it: commands reach it through `entry.py`.
"""
