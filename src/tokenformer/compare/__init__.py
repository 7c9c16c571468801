"""The honest comparison: arms under one budget, over several seeds, and what they let one conclude."""
