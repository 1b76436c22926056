# Portcullis @VERSION@ as a Salt state of dom0: the same as install.sh does.
#
# Copy this folder to /srv/user_salt/portcullis (see INSTALL.md), then
#   sudo qubesctl state.apply portcullis saltenv=user
# To switch qubes over, see the closing lines of install.sh.
{% if grains['id'] == 'dom0' %}

portcullis-kernel:
  file.managed:
    - name: /var/lib/qubes/vm-kernels/@KERNEL@/vmlinuz
    - source: salt://portcullis/vmlinuz
    - source_hash: sha256=@SHA256@
    - makedirs: True
    - mode: '0644'

portcullis-qube:
  qvm.vm:
    - name: sys-portcullis
    - present:
      - class: StandaloneVM
      - label: green
    - prefs:
      - netvm: sys-net
      - memory: 32
      - virt_mode: pvh
      - kernel: @KERNEL@
      - kernelopts: ''
      - maxmem: 0
      - vcpus: 1
      - provides_network: True
      - audiovm: ''
      - guivm: ''
      - include_in_backups: False
    - features:
      - enable:
        - qubes-firewall
        - no-default-kernelopts
        - skip-update
        - qrexec
        - vmexec
      - disable:
        - gui
    - require:
      - file: portcullis-kernel

{% endif %}
