"""Diagnosis of this machine: what works, found out by trying it, and what to do about the rest.

    run           `examine`: runs the probes
    probes        machine (what is there), attempts (what works), storage (how fast SOURCE is read)
    lanes         the processes in which probes run
    advice        what follows from their answers
    examination   the result, as JSON and as text

A broken CUDA or DALI can crash the process that imports it. So only the standard library is imported here; probes
import the rest in their own processes.
"""

from dali_diffusemix.doctor.advice import Feature
from dali_diffusemix.doctor.examination import Examination
from dali_diffusemix.doctor.lanes import Answer
from dali_diffusemix.doctor.run import examine

__all__ = ["Answer", "Examination", "Feature", "examine"]
