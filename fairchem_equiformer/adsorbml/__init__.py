"""AdsorbML: adsorption energies of adsorbate-surface pairs, by a model and few DFT calculations.

Lan et al., npj Comput. Mater. 9, 172 (2023); EquiformerV2's paper, section 4.1.3, appendix D.4.
`docs/adsorbml.md` tells all of it, `python -m fairchem_equiformer.adsorbml --help` the commands.

    placements    adsorbates on surfaces to begin with: a folder of structures, or an LMDB
    relaxation    relaxes them one by one with a calculator of ASE, that of a checkpoint too
    batches       relaxes many at a time with fairchem-core 1.10
    ranking       leaves out the invalid, sorts the others by energy
    single_points energies of the best few by DFT: any calculator of ASE, or input files of VASP
    score         success rate and speed-up against relaxing all placements by DFT
    oc20_dense    the published reference
"""
