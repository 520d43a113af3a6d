"""Measured fidelity: who is it, is it what the prompt asked for, is it a copy?"""
